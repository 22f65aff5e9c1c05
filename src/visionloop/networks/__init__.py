"""Networks: backbones, the classifier around them, and their export to ONNX. The only home of network code."""
