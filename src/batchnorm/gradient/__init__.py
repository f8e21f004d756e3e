"""The gradient explained: its three pathways, what is wrong with one derived by hand, an example in the terminal.

`pathways` takes the gradient apart; `slips` holds the mistakes that are made with it, `diagnosis` names the one in a
given gradient; `worked_example` is `python -m batchnorm explain`. The public names are those of `batchnorm` itself.
"""
