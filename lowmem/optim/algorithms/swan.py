"""SWAN: gradient descent on standardised and whitened gradients, without any state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.matrices import is_matrix
from lowmem.optim.rule import Rule, Shape
from lowmem.optim.rules.adam import Adam
from lowmem.optim.rules.whitened import WhitenedGradient
from lowmem.optim.settings import Betas, Eps, LearningRate, Range, Rounding, Seed, StorageSetting, WeightDecay


class Swan(LowMemOptimizer):
    """Gradient descent with each matrix' gradient standardised by rows and whitened.

        X <- rows of G with mean 0 and variance 1                                (m, n)
        U <- (X X^T)^(-1/2) X, or X (X^T X)^(-1/2) where m > n
        U <- sqrt(m n) U / |U|                                                   root mean square 1
        W <- W - lr (scale U + weight_decay W)

    What it saves: all of Adam's state; a matrix has none. What it takes while a matrix is updated: four float32
    matrices of its smaller side squared (two with "nsds"), never a float32 copy of it: X is made some rows at a time.

    A parameter that is no matrix takes Adam. Embeddings and the output head should have another rule, and
    `build_optimizer` gives them the `fallback`. It decides how small the state is: Adam in float32 takes 8 bytes a
    value, of a vocabulary of 128,256 at a width of 4096 3.9 GiB a matrix. `{name: adamw, storage: {moment: int8,
    variance: int8}}` takes a quarter of that, `{name: adafactor}` and `{name: sinkgd, normalize: row}` next to
    nothing, `{name: sinkgd, normalize: row, momentum: 0.9}` one value in the weight's dtype for each of the
    weight. 3-D parameters are batches of matrices.

    The step does not depend on the size of the gradient: its root mean square is lr * `scale` from the first step to
    the last. So clipping gradients changes nothing for matrices, a schedule that decays matters, and a small batch
    wants a small learning rate. `scale` 0.2 is about the size of Adam's step, so that one learning rate serves
    matrices and fallback; the paper pre-trains with 0.05 and lr 0.02. Whitening makes the weakest directions of
    a gradient as long as its strongest: of a gradient of low rank that is noise.

    `whitening` says how the inverse square root is found, on the Gram matrix of the smaller side and in float32
    whatever the weight's dtype: "newton_schulz" is the paper's, 3 products an iteration; singular values end within
    0.9 to 1.1 of their median. "quintic", the default, is Muon's polynomial, half the work and 0.7 to 1.3, wider
    where the gradient is nearly singular. "nsds" replaces products by diagonals, costs next to nothing, and only
    brings the singular values somewhat closer. "eigh" is exact, in float64, and slow.

    Source: Ma et al., "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training",
    arXiv:2412.13148. Not held against code of the authors. As printed, the iteration starts at X X^T whose trace is
    m n and diverges: here it is divided by its norm first, which the last line of the step makes up for. Rows are
    centred and scaled in the layout of `torch.nn.Linear`, a row an output, also where whitening is on the other side.
    The variance is over n; a row whose entries are all alike becomes zeros. Weight decay is lr * weight_decay and
    not multiplied by `scale`; the quintic polynomial and "eigh" are not the paper's.
    """

    algorithm = "swan"
    treats_matrices = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-4,
        *,
        whitening: Annotated[
            Literal["quintic", "newton_schulz", "nsds", "eigh"], "how the inverse square root is found"
        ] = "quintic",
        iterations: Annotated[
            int | None,
            Range(at_least=1, at_most=100),
            "of the whitening; null (None) for 5 (quintic), 10 (newton_schulz), 2 (nsds)",
        ] = None,
        standardize: Annotated[
            bool, "bring rows to mean 0 and variance 1 before; without it whitening alone"
        ] = True,
        scale: Annotated[
            float, Range(above=0), "root mean square of a step over lr; the paper's alpha is 0.05"
        ] = 0.2,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        storage: StorageSetting = None,
        rounding: Rounding = "stochastic",
        seed: Seed = 0,
    ):
        settings = dict(
            lr=lr,
            whitening=whitening,
            iterations=iterations,
            standardize=standardize,
            scale=scale,
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
        return WhitenedGradient(
            whitening=group["whitening"],
            iterations=group["iterations"],
            standardize=group["standardize"],
            rescale=True,
            scale=group["scale"],
        )
