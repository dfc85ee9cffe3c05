"""Parts written by the user: classes that the config names. They are imported, checked and measured.

    model.norm=mypkg.norms:MyNorm         a class of a module that Python finds: installed, or in the current folder
    model.norm=dyt                        an entry point of the group gpt.norm

Importing a class imports torch. In a process without torch, ``facts`` lets another process do this.
"""
