"""Graph: tools on `torch.fx` graphs. Not a stage: capture, plan, lower and planfile use them.

`functionalise` rewrites in-place operations, `layout` makes and compares strides, `layout_inference` works out the
layout of every value from the inputs, `flops` counts floating-point operations. Each takes a graph and knows nothing
of schedules or runs.

Hazard: a rewrite could change bits. Everything dropped or replaced here leaves the values the same bit for bit.
"""
