"""A local web page that steers a streaming model with the keyboard."""
