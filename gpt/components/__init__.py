"""Parts of the user's own: classes named in the config, found, checked and measured.

    model.norm=mypkg.norms:MyNorm         a class of a module that Python finds: installed, or in the current folder
    model.norm=dyt                        an entry point of the group gpt.norm

Torch is imported where a class is; ``facts`` has another process do that where torch is not loaded yet.
"""
