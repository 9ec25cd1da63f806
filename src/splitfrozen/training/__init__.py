"""Training from stored activations: batches, lifting, the loop and evaluation.

batching.py    which samples form a batch, in what order; padding; the shuffle window
lift.py        brings every stored activation to the cut, once
precision.py   which floating-point format the server computes in
optimise.py    one optimiser step over one batch
loop.py        the training loop: epochs, evaluation, checkpoints, stopping
checkpoint.py  durable files, and the checkpoint as one of them
evaluate.py    accuracy, F1, perplexity, exact match
"""
