"""Loss curves: do two ways of training learn the same?"""
