"""Recurrent and convolution state, where it is kept and how it comes to the device."""
