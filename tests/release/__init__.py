"""What a release is checked with: its files built, installed into clean environments and run there.

    make release        # all of it, and docs/tables/wheels.*

- ``contents``: what the sdist and the wheels must hold.
- ``artifacts``: build them, audit the native library.
- ``environments``: clean environments, and what an install changed in one.
- ``probe``: the program that runs inside each environment.
- ``matrix``: Python versions x torch versions, and the table.
- ``first_image``: from nothing to the first fused image, timed by phase.
"""
