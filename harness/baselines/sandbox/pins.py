"""Pins shared by all environments with torch, so that every such system has the same release as ours."""

TORCH = "torch==2.13.0"
TRANSFORMERS = ("transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6", "safetensors==0.8.0")
