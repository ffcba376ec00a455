"""The classes of errors, each naming whose fault it is.

Few classes, chosen by who has to act. Messages are sentences for a person: what is wrong, and
what to do about it. Library exceptions are mapped to these once, at the edge where they appear.
Anything else that escapes is a bug of ours.
"""

from __future__ import annotations


class MeshError(Exception):
    """Base of every error that p2pmesh raises on purpose.

    Attributes:
        exit_code: What the command line returns when this reaches it.
    """

    exit_code = 1


class ConfigError(MeshError):
    """The user gave an option, variable, file or argument that cannot be used.

    Nothing was started or changed. The user corrects the input.
    """

    exit_code = 2


class LocalError(MeshError):
    """This machine cannot do it now: a port is taken, a disk full, a file unreadable.

    Nothing of the mesh changed. The user makes room or chooses otherwise.
    """


class ModelError(MeshError):
    """A model file is damaged, forged, or of a kind that p2pmesh does not know.

    The file is not used; everything else goes on.
    """


class EngineError(MeshError):
    """The inference engine is missing, refused to start, or died.

    The model is not served here until a later attempt succeeds.
    """


class PeerError(MeshError):
    """A peer broke the protocol: its bytes cannot be decoded, or its proof is wrong.

    No state changed. The caller drops that peer's connection and goes on.
    """


class LinkError(MeshError):
    """The network between here and a peer failed: refused, reset, timed out, or closed.

    What was being sent may or may not have arrived. The caller retries or takes another way.
    """
