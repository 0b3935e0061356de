"""SinkGD: the gradient with its rows and columns normalised, without any state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.matrices import is_matrix
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.adam import Adam
from lowmem.optim.rules.normalized import NormalizedGradient
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay


class SinkGD(LowMemOptimizer):
    """Gradient descent with rows and columns of each matrix' gradient normalised in turn (Sinkhorn's algorithm).

        X <- G                                                                   (m, n)
        repeat `iterations` times:
            X <- rows of X divided by their root mean square
            X <- columns of X divided by their root mean square
        W <- W - lr (scale X + weight_decay W)

    What it saves: all of Adam's state. A matrix has none, unless `momentum` is set: then G is replaced by its
    running mean M <- momentum M + (1 - momentum) G, one tensor of the parameter's shape.

    A parameter that is no matrix takes Adam. Embeddings and the output head do better with another rule (a token
    that is rare in a batch would take as long a step as a frequent one): `build_optimizer` gives them the
    `fallback`, and {name: adafactor} there keeps their state small too. 3-D parameters are batches of matrices.

    The step does not depend on the size of the gradient: its root mean square is lr * `scale` from the first step
    to the last. So clipping gradients changes nothing for matrices, a schedule that decays matters, and
    a small batch wants a small learning rate. `scale` 0.2 is about the size of Adam's step, so that one
    learning rate serves matrices and fallback; the paper pre-trains with 0.05 and lr 0.02.

    `normalize="row"` divides the rows by their root mean square and leaves it at that, "column" the columns. SCALE is
    rows for matrices and head, momentum for the head alone, columns for the embedding, and Adam for norms:

        optimizer:
          {name: sinkgd, lr: 1.0e-4, normalize: row, scale: 1.0,
           head: {name: sinkgd, momentum: 0.9}, fallback: {name: sinkgd, normalize: column}}

    Source: Scetbon et al., "Gradient Multi-Normalization for Stateless and Scalable LLM Training",
    arXiv:2502.06742, algorithm SR-Sinkhorn; SCALE: "A Minimalist Optimizer Design for LLM Pretraining",
    arXiv:2506.16659. Only the factors of rows and columns are iterated, which gives the same X (to 1e-6) without a
    tensor of the gradient's size; weight decay is lr * weight_decay and not multiplied by `scale`; momentum is
    not in SinkGD's paper.
    """

    algorithm = "sinkgd"
    treats_matrices = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-4,
        *,
        normalize: Annotated[
            Literal["sinkhorn", "row", "column"], "rows and columns in turn, or one of them alone (SCALE)"
        ] = "sinkhorn",
        iterations: Annotated[int, Range(at_least=1), "times that rows and columns are normalised (L)"] = 5,
        scale: Annotated[
            float, Range(above=0), "root mean square of a step over lr; the paper's alpha is 0.05"
        ] = 0.2,
        momentum: Annotated[
            float, Range(at_least=0, below=1), "decay of the running gradient; 0 keeps no state"
        ] = 0.0,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        storage: StorageSetting = None,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            normalize=normalize,
            iterations=iterations,
            scale=scale,
            momentum=momentum,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            storage=storage,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(params, settings)

    @staticmethod
    def rule(group: dict[str, Any], shape: Shape) -> Rule:
        if not is_matrix(shape):
            return Adam(betas=tuple(group["betas"]), eps=group["eps"])
        return NormalizedGradient(
            normalize=group["normalize"],
            iterations=group["iterations"],
            scale=group["scale"],
            momentum=group["momentum"],
        )
