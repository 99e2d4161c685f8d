"""QK norms out of a model, and into one.

strip/      out of the modules of a model in place, or out of a copy of an ATen graph of it
insert/     into modules or a graph, to compare QuacK with
dynamo.py   the backend of torch.compile that takes them out of what Dynamo hands over
call.py     example inputs as users give them
"""
