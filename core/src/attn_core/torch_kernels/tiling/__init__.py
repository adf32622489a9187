"""How `torch/tiled` cuts a mask into small dense problems, and runs them.

intervals.py   masks whose queries see one range of keys each -> tiles
documents.py   documents of a packed sequence -> tiles, or one causal problem each
boxes.py       neighborhoods on grids -> boxes of queries
chosen.py      boxes and batches of neighborhoods that a caller chooses
blocks.py      any other mask, by its `span`, `tile` and `keep`
runs.py        tiles of one shape, and how they are read from overlapping views
sequence.py    runs on the operands as they are
strips.py      runs on strips of a grid
dense.py       the dense kernels that compute a batch of tiles
scores.py      what is added to the logits of a batch of tiles
limited.py     runs in small tiles, where something is added
tables.py      what is kept of a cut mask, within a bound
function.py    the forward and the backward, as one differentiable function
traced*.py     the same as one op, for graphs; with scores, whose tensors are operands
work*.py       what a call will do, for the estimate; with scores, the numbers that are made
"""
