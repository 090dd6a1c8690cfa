"""The evaluation on a real pretrained model: SmolLM2-135M-Instruct, which a Python package ships."""
