"""A real RTSP camera with H.264, by GStreamer: `python3 gst_camera.py [LOGIN:PASSWORD]` with the system's Python.

It prints its port, and reads its standard input: a line `0xffRRGGBB` is the colour that it shows from then on.
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

PICTURE = "video/x-raw,width=320,height=240,framerate=10/1"
LAUNCH = (
    f"( videotestsrc name=picture is-live=true pattern=solid-color foreground-color=0xffdc1e1e ! {PICTURE}"
    " ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10 ! rtph264pay name=pay0 pt=96 )"
)


def protect(server: "GstRtspServer.RTSPServer", factory: "GstRtspServer.RTSPMediaFactory", login: str) -> None:
    """Let only the one login in."""
    auth = GstRtspServer.RTSPAuth()
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "user")
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(*login.split(":", 1)), token)
    server.set_auth(auth)
    permissions = GstRtspServer.RTSPPermissions()
    permissions.add_role("user")
    permissions.add_permission_for_role("user", "media.factory.access", True)
    permissions.add_permission_for_role("user", "media.factory.construct", True)
    factory.set_permissions(permissions)


def main() -> None:
    """Serve until the input ends."""
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service("0")
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(LAUNCH)
    factory.set_shared(True)
    pictures, color = [], [0xFFDC1E1E]

    def configure(_: object, media: "GstRtspServer.RTSPMedia") -> None:
        pictures[:] = [media.get_element().get_by_name_recurse_up("picture")]
        pictures[0].set_property("foreground-color", color[0])

    factory.connect("media-configure", configure)
    if len(sys.argv) > 1:
        protect(server, factory, sys.argv[1])
    server.get_mount_points().add_factory("/cam", factory)
    server.attach(None)
    print(server.get_bound_port(), flush=True)
    loop = GLib.MainLoop()

    def read(source: object, condition: object) -> bool:
        line = sys.stdin.readline()
        if not line:
            loop.quit()
            return False
        color[0] = int(line, 16)
        for picture in pictures:
            picture.set_property("foreground-color", color[0])
        return True

    GLib.io_add_watch(sys.stdin, GLib.IO_IN | GLib.IO_HUP, read)
    loop.run()


if __name__ == "__main__":
    main()
