def traced(*a): raise NotImplementedError
