"""Files that are whole or absent: atomic directories and safetensors."""
