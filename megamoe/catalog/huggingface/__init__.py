"""Reads a Hugging Face config.json as a Model of the catalog.

    config.json -> keys (typed, each marked as read)
                     layers     which layers have experts        mixers   which attention each layer has
                     attention  the sizes of each attention      formats  what the weights are stored in
                -> model -> unread: a key that places layers and that nothing has read refuses the config

Families differ in the names of the same sizes, and in how they place their layers; a name that several families share
is read the same way for all, so that a new model of a known shape needs no code here.
"""

from megamoe.catalog.huggingface.model import model_from_config

__all__ = ["model_from_config"]
