"""Update rules of a block, one algorithm a file, as diffusers scheduler objects."""
