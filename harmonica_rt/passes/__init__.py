"""Passes: functions from graph to graph, or from graph to facts, each saying what it requires and ensures."""
