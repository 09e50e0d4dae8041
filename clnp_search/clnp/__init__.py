"""The method itself, as a library: needs torch, numpy and safetensors alone."""
