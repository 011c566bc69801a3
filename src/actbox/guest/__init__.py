"""What runs inside the sandbox: standard library and IPython only; of actbox it knows nothing but the frames."""
