"""The gradient explained: its three pathways, a diagnosis of hand-derived gradients, a worked example.

    diagnosis ─┬─ search ───── slips ─┐
               └─ parameters ─────────┴─ right ─┬─ pathways
    worked_example ─┬───────────────────────────┤
                    └─ page, picture ─ numbers ─┘
                                   └── graph

`pathways` takes the gradient apart. `right` has the right gradient, its parts, and how far rounding may move it.
`slips` is the catalogue of mistakes in dx, `parameters` that of mistakes in dgamma and dbeta. `search` finds the
formula that gives a dx; `diagnosis` uses both and answers in words. `worked_example` is `python -m batchnorm explain`.
`page` writes it for a browser and `picture` draws it: the `numbers` on the boxes and edges of `graph`. The public names
are in `batchnorm` itself.
"""
