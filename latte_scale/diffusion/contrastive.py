"""The contrastive loss: a clip's features should align with its own condition and not with its neighbours'.

In: one embedding per clip from the middle of the model and one of its caption or label. Out: one loss per clip.
The decision worth knowing: negatives come only from a fixed group of consecutive samples of the global batch, all in
one micro-batch. So no collective is needed, and the loss does not depend on world size or micro-batch.

Shape legend: B batch, G groups, R rows of a group, E width of an embedding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class ContrastiveSettings:
    """Weight, temperature and groups of the contrastive loss, which is added to the diffusion loss; off by default."""

    weight: float = 0.0  # weight of the contrastive loss, added to the diffusion loss; 0: off
    temperature: float = 0.07  # divides the cosine similarities
    group: int = 8  # consecutive samples of the global batch that serve as each other's negatives

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight: expected 0 or more, got {self.weight}; 0 is off")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected above 0, got {self.temperature}; 0.07 is usual")
        if self.group < 2:
            raise ValueError(f"group: expected at least 2 samples, got {self.group}; one alone has no negatives")


def info_nce(video_BE: Tensor, condition_BE: Tensor, condition_B: Tensor, group: int, temperature: float) -> Tensor:
    """Symmetric InfoNCE (arXiv 1807.03748, equation 4; both directions, arXiv 2103.00020, section 2.3), float32 [B].

    video_BE, condition_BE: embeddings of any length; their cosines are compared. condition_B: int64, equal for equal
    conditions; -1 for an excluded row (dropped condition, empty slot), whose loss is 0. group: rows 0 ..
    group - 1 are one group, and so on; each row's negatives are the rows of its group with another condition, so a
    group with fewer than two conditions gives 0.
    Raises ValueError when the rows do not divide into groups.
    """
    if video_BE.shape != condition_BE.shape or len(video_BE) % group:
        raise ValueError(
            f"contrastive loss: expected two equal shapes of a multiple of {group} rows, got {list(video_BE.shape)} "
            f"and {list(condition_BE.shape)}; make train.micro_batch a multiple of the group"
        )
    condition_GR = condition_B.view(-1, group)
    active_GR = condition_GR >= 0
    negative_GRR = condition_GR[:, :, None] != condition_GR[:, None, :]
    negative_GRR = negative_GRR & active_GR[:, :, None] & active_GR[:, None, :]
    own_RR = torch.eye(group, dtype=torch.bool, device=video_BE.device)
    with torch.autocast(video_BE.device.type, enabled=False):
        video_GRE, condition_GRE = (
            functional.normalize(embedding_BE.float(), dim=-1).view(-1, group, embedding_BE.shape[-1])
            for embedding_BE in (video_BE, condition_BE)
        )
        logits_GRR = video_GRE @ condition_GRE.transpose(1, 2) / temperature
    logits_GRR = logits_GRR.masked_fill(~(own_RR | negative_GRR), -torch.inf)  # a row without negatives: exactly 0
    of_videos_GR = logits_GRR.log_softmax(2).diagonal(dim1=1, dim2=2)
    of_conditions_GR = logits_GRR.log_softmax(1).diagonal(dim1=1, dim2=2)
    return -0.5 * (of_videos_GR + of_conditions_GR).reshape(-1)
