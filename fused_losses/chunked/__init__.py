"""The kernels' twins in plain PyTorch: same functions, same signatures, for devices that Triton does not serve.

They process the rows in chunks, so that the memory they hold beside inputs and outputs does not grow with the input.
"""
