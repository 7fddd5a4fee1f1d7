"""Graph: tools for `torch.fx` graphs. This is not a stage: capture, plan, lower and planfile use it.

`facts` answers questions about a node (its value, whether it is a view, what it needs), `match` compares nodes with
declared patterns, `rebuild` copies graphs node by node, `functionalise` rewrites in-place operations, `layout` makes
and compares strides, `layout_inference` works out the layout of every value from the inputs (plan files alone need it),
`flops` counts floating-point operations, `weighted_sum` is what a reused entry with weights stands for. None of them
knows about schedules or runs.

Hazard: a rewrite could change bits. Everything dropped or replaced here leaves the values the same bit for bit.
"""
