"""What a training loop needs beside the layer: routing kept in balance, gradients of weights that every rank has."""
