from typing import NamedTuple
import torch
class Tile(NamedTuple):
    n: int
    v: int
    k: int
    d: int
    warps: int
    stages: int
def pick_tile(dtype: torch.dtype, width: int) -> Tile:
    return Tile(16,32,32,32,4,2)
