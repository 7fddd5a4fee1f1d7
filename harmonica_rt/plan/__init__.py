"""Plan: step patterns -> programs, lifetimes -> slots, and the rules that every plan keeps."""
