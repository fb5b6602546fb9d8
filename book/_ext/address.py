"""Links to the repository and to the published book, when the build knows where they are.

The repository is taken from the environment of a CI job or else from git's remote ``origin``,
if that is on a host whose pages Sphinx's theme can address. The address of the published book
is taken from ``LIPBOOK_URL``, which the job that publishes it sets. Without them the pages have
no such button and no such link: nothing is guessed. With the address of the published book come
a list of its pages for search engines, and the image that others show beside a link to a page.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

if TYPE_CHECKING:  # the package's build asks for the addresses too, without Sphinx
    from sphinx.application import Sphinx
    from sphinx.config import Config

CARD = "card.png"  # in html_static_path; tools/stills.py draws it
CARD_ALT = (
    "Ten handwritten digits, each with a certified radius. Attacked within it, an ordinary network "
    "is wrong on all of them, and a Lipschitz network on none."
)
HOSTS = {"github.com": "github", "gitlab.com": "gitlab"}
# git@host:owner/name.git, ssh://git@host/owner/name.git, https://user@host/owner/name
REMOTE = re.compile(r"(?:\w+://)?(?:[^@/]+@)?(?P<host>[\w.-]+)[:/](?P<path>.+?)(?:\.git)?/?")


class Repository(NamedTuple):
    """Where the sources are on the web."""

    url: str
    provider: str
    branch: str


def git(folder: str, *arguments: str) -> str:
    try:
        run = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return run.stdout.strip()


def repository(environment: dict[str, str], folder: str) -> Repository | None:
    server, name = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_REPOSITORY")
    if server and name:
        reference = environment.get("GITHUB_REF", "")
        named = reference.startswith(("refs/heads/", "refs/tags/"))
        branch = reference.split("/", 2)[2] if named else "main"
        return Repository(f"{server}/{name}", "github", branch)
    if "CI_PROJECT_URL" in environment:
        branch = environment.get("CI_COMMIT_REF_NAME", "main")
        return Repository(environment["CI_PROJECT_URL"], "gitlab", branch)
    remote = REMOTE.fullmatch(git(folder, "remote", "get-url", "origin"))
    if remote is None or remote["host"] not in HOSTS or remote["path"].count("/") != 1:
        return None
    branch = git(folder, "symbolic-ref", "--short", "HEAD") or "main"
    return Repository(f"https://{remote['host']}/{remote['path']}", HOSTS[remote["host"]], branch)


def published(environment: dict[str, str]) -> str:
    """Address of the published book, "" if it is not known."""
    site = environment.get("LIPBOOK_URL", "").rstrip("/")
    if site and urlsplit(site).scheme not in ("http", "https"):
        raise ValueError(f"LIPBOOK_URL: expected http(s)://..., got {site!r}")
    return f"{site}/" if site else ""


def configure(app: Sphinx, config: Config) -> None:
    environment = dict(os.environ)
    options = config.html_theme_options
    known = repository(environment, str(app.srcdir))
    buttons = options.setdefault("launch_buttons", {})
    if known is None:
        options["repository_url"] = ""
        buttons.update(binderhub_url="", colab_url="")
    else:
        options["repository_url"] = known.url
        options["repository_provider"] = known.provider
        options["repository_branch"] = known.branch
        options["use_repository_button"] = options["use_issues_button"] = True
        if known.provider != "github":
            buttons["colab_url"] = ""

    site = published(environment)
    config.html_baseurl = config.ogp_site_url = site
    if site:
        config.ogp_image, config.ogp_image_alt = f"_static/{CARD}", CARD_ALT
        large = '<meta name="twitter:card" content="summary_large_image" />'
        config.ogp_custom_meta_tags = [*config.ogp_custom_meta_tags, large]
    # The page for missing pages is served at any depth, so its links start at the host.
    config.notfound_urls_prefix = urlsplit(site).path or "/"


def no_unknown_address(
    app: Sphinx, page: str, template: str, context: dict[str, Any], _: Any
) -> None:
    if not app.config.ogp_site_url:
        context["metatags"] = re.sub(
            r'<meta property="og:url"[^>]*/>\s*', "", context.get("metatags", "")
        )


def announce(app: Sphinx, exception: Exception | None) -> None:
    """List the pages for search engines, in the form that they read, if the address is known."""
    site = app.config.html_baseurl
    if exception is not None or app.builder.name != "html" or not site:
        return
    pages = [app.builder.get_target_uri(name) for name in sorted(app.env.found_docs)]
    urls = "".join(f"<url><loc>{html.escape(site + page)}</loc></url>\n" for page in pages)
    schema = "http://www.sitemaps.org/schemas/sitemap/0.9"
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="{schema}">\n{urls}</urlset>\n'
    (Path(app.outdir) / "sitemap.xml").write_text(text, "utf-8")
    (Path(app.outdir) / "robots.txt").write_text(f"Sitemap: {site}sitemap.xml\n", "utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", configure, priority=100)
    app.connect("html-page-context", no_unknown_address, priority=900)
    app.connect("build-finished", announce)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
