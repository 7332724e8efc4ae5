"""Update rules of a block, one family a file, as diffusers scheduler objects.

`unmask.UnmaskScheduler` reveals codes: `rows(length)` plans the forwards, `select(row, ...)` picks
the slots. `flow.FlowEuler`, `flow.Renoise` and `multistep.Multistep` lower the noise level of
continuous blocks: `rows(num_steps)`, `begin()`, `step(prediction, row, sample, generators)`.
`build.build_scheduler` makes either from plain settings and knows published decoders by name.

A new algorithm is a new file here. Derive from `LevelScheduler` or `UnmaskScheduler`, decorate
`__init__` with `register_to_config`, and `from_config` moves settings between the family's members.
"""
