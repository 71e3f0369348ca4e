"""Exchange of networks and properties with other tools: ONNX, VNN-LIB, TorchScript and safetensors."""
