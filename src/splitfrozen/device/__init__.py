"""What runs on a device: ONNX Runtime, a tokenizer and an HTTP client, and no training framework.

`agent.join` is the whole of it; `front`, `probe`, `plan`, `pipeline` and `uploader` are its parts.
"""
