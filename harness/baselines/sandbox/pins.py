"""Pins that environments with torch share, so that every such system has the release that ours has."""

TORCH = "torch==2.13.0"
TRANSFORMERS = ("transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6", "safetensors==0.8.0")
