"""Before a long run: does the mask really hide what it should?

One real batch goes through the network twice, once with the content of one row changed. Rows that
the changed row cannot reach through the mask, layer after layer, must keep every bit.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from ..core.errors import ModelError
from .objective import ModelStage

SELF_CHECK_ITEMS = 2


def influence(visible: Bool[Tensor, "rows rows"], num_layers: int) -> Bool[Tensor, "rows rows"]:
    """Tell which rows (columns) can influence which others (rows of the result) through layers.

    One layer passes on what a row sees and the row itself; the result is that relation applied
    `num_layers` times.
    """
    step = visible.double() + torch.eye(len(visible), dtype=torch.float64)
    reach = torch.eye(len(visible), dtype=torch.float64)
    for _ in range(num_layers):
        reach = (step @ reach > 0).double()
    return reach > 0


@torch.no_grad()
def mask_self_check(stage: ModelStage, generator: torch.Generator) -> int:
    """Change one row of a real batch and demand that no row outside its cone moves.

    Args:
        stage: Stage about to be trained.
        generator: Randomness of the batch.

    Returns:
        Number of rows that had to stay and did; 0 for masks in which every row reaches all.

    Raises:
        ModelError: a row moved that the mask shields, or the changed row itself did not move.
    """
    model = stage.model
    indices = torch.arange(min(SELF_CHECK_ITEMS, stage.num_items))
    plan, layout, lowered = stage.plan(generator)
    batch = stage.corrupt(stage.values[indices], plan, layout, generator)
    visible = plan.table.visible(layout, layout, routes=plan.routes(layout)).cpu()
    reach = influence(visible, model.backbone.config.num_layers)
    is_data = (layout.source >= 0).cpu()
    shielded = (~reach).sum(0) * is_data
    row = int(shielded.argmax())
    if not int(shielded[row]):
        return 0
    prompt = model.unprompted(len(indices))
    was_training = model.training
    model.eval()

    def states(values: Tensor, is_masked: Tensor) -> Tensor:
        return model.backbone(values, is_masked, layout, batch.level, prompt, lowered)

    is_masked = batch.is_masked.clone()
    is_masked[:, row] = False
    before = states(batch.values, is_masked)
    changed = batch.values.clone()
    if changed.is_floating_point():
        changed[:, row] += 1
    else:
        acting = model.recipe.acting
        known = min(filter(None, (model.config.codebook_size, acting and acting.codes)))
        changed[:, row] = (changed[:, row] + 1) % known
    moved = (states(changed, is_masked) != before).any(-1).any(0).cpu()
    model.train(was_training)
    leaks = (moved & ~reach[:, row]).nonzero()[:, 0].tolist()
    if leaks:
        raise ModelError(
            f"mask self-check: row {leaks[0]} changed with row {row}, which its mask hides from it"
        )
    if not bool(moved[row]):
        raise ModelError(f"mask self-check: row {row} ignores its own content")
    return int(shielded[row])
