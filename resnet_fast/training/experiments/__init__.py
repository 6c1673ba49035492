"""The paper's own comparisons, run again: which nets, by which protocol, and what has to come out.

``protocols`` names the experiments and their runs, ``runs`` trains what is not trained yet, ``responses`` looks into
the trained nets, ``verdicts`` holds the figures against the paper's claim, ``report`` writes it down.
"""
