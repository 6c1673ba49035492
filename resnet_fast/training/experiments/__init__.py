"""The paper's own comparisons, repeated.

``protocols`` lists the experiments and their runs, ``runs`` trains what is not trained yet, ``responses`` measures
layers of the trained nets, ``verdicts`` compares the figures with the paper's claims, ``report`` writes the pages.
"""
