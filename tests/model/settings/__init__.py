"""A package of settings, which forwards read by importing it."""
