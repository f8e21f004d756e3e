"""`python -m batchnorm profile`: how long the three passes take, their lower limit, and how large their errors are.

- `networks`: the layer shapes of real networks.
- `measure`: passes, contestants, the copy limit, and turns of calls. `bench/` measures with it too.
- `report`: the table and the plot.
- `command`: the options, and the program that runs them.

rich, matplotlib and torch are optional and imported only where they are used.
"""
