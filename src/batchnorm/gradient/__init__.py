"""The gradient explained: its three pathways, what is wrong with one derived by hand, an example worked out.

    diagnosis ─┬─ search ───── slips ─┐
               └─ parameters ─────────┴─ right ─┬─ pathways
    worked_example ─┬───────────────────────────┤
                    └─ page, picture ─ numbers ─┘
                                   └── graph

`pathways` takes the gradient apart. `right` has the right gradient, its parts, and what rounding may do to it. `slips`
is the catalogue of mistakes in dx, `parameters` of those in dgamma and dbeta. `search` finds the formula that gives a
dx; `diagnosis` asks both and answers in words. `worked_example` is `python -m batchnorm explain`; `page` writes for a
browser and `picture` draws what it explains, the `numbers` on the boxes and edges of `graph`. The public names are
those of `batchnorm` itself.
"""
