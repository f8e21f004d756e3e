"""`python -m batchnorm profile`: how long the three passes take, how long they must take, and how large errors are.

- `networks`: the layer shapes of real networks.
- `measure`: passes, contestants, the copy limit, and turns of calls. `bench/` measures with it too.
- `report`: the table and the plot.
- `command`: the options, and what they lead to.

rich, matplotlib and torch are optional and imported only where they are used.
"""
