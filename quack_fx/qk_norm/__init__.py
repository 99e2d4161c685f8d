"""Removes QK norms from a model, or adds them.

strip/      removes them from a model's modules in place, or from a copy of its ATen graph
insert/     adds them to modules or to a graph, as a baseline for QuacK
dynamo.py   a torch.compile backend that removes them from Dynamo's graphs
report.py   what was removed or added
call.py     example inputs as call arguments; wrapped models are refused
"""
