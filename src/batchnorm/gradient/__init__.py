"""The gradient explained: its three pathways, what is wrong with one derived by hand, an example in the terminal.

    diagnosis ─┬─ search ───── slips ─┐
               └─ parameters ─────────┴─ right ─┬─ pathways
    worked_example ─────────────────────────────┘

`pathways` takes the gradient apart. `right` has the right gradient, its parts, and what rounding may do to it. `slips`
is the catalogue of mistakes in dx, `parameters` of those in dgamma and dbeta. `search` finds the formula that gives a
dx; `diagnosis` asks both and answers in words. `worked_example` is `python -m batchnorm explain`. The public names
are those of `batchnorm` itself.
"""
