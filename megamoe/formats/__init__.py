"""Number formats: what they hold, how values are rounded to them, and what a layer must know of weights in each."""

from megamoe.formats.blocks import BLOCK, chunks, e8m0_to_float
from megamoe.formats.cast import BF16Weights, CastWeights
from megamoe.formats.e4m3 import dequantize_e4m3_blocks, mxfp4_to_e4m3, quantize_e4m3_blocks
from megamoe.formats.mxfp4 import (
    E2M1_MAGNITUDES,
    MXFP4,
    MXFP4_MAX_SCALE,
    MXFP4Weights,
    dequantize_mxfp4,
    pack_e2m1,
    quantize_mxfp4,
    unpack_e2m1,
)
from megamoe.formats.mxfp8 import MXFP8, dequantize_mxfp8, quantize_mxfp8, take_rows
from megamoe.formats.weight import SCALES, VALUES, WeightFormat

# of expert weights, by name; the first is what a layer has by default
WEIGHT_FORMATS: dict[str, WeightFormat] = {each.name: each for each in (MXFP4Weights(), BF16Weights())}

__all__ = [
    "BLOCK",
    "E2M1_MAGNITUDES",
    "MXFP4",
    "MXFP4_MAX_SCALE",
    "MXFP8",
    "SCALES",
    "VALUES",
    "WEIGHT_FORMATS",
    "BF16Weights",
    "CastWeights",
    "MXFP4Weights",
    "WeightFormat",
    "chunks",
    "dequantize_e4m3_blocks",
    "dequantize_mxfp4",
    "dequantize_mxfp8",
    "e8m0_to_float",
    "mxfp4_to_e4m3",
    "pack_e2m1",
    "quantize_e4m3_blocks",
    "quantize_mxfp4",
    "quantize_mxfp8",
    "take_rows",
    "unpack_e2m1",
]
