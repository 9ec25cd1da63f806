"""The model: cut into blocks, adapted with LoRA, exported for devices, priced.

`blocks` is the only file that knows transformers' internals; `adapters` speaks to peft, `export` to
ONNX. Nothing a device imports comes from here.
"""
