"""Plain one-page twins of every algorithm: no lowmem import, no storage, no tiles, any float dtype.

Each module has `reference(params, **settings)`, an object with `step(grads)` that updates the tensors in
`params` (a list) in place from the tensors in `grads` (None skips).
"""
