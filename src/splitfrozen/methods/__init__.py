"""Methods: what is trained, on which side, and what crosses the network for it.

`table.build` makes any of them; `training.loop.fit` trains all of them.
"""
