"""Formulas for character recognition: 48 long ones, rendered at 200 dpi."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WIDTH = 600  # pixels of the narrowest page: short lines are not blown up

FORMULAS = (
    r"\frac{\partial^2 u}{\partial t^2}=c^2\left(\frac{\partial^2 u}{\partial x^2}+\frac{\partial^2 u}{\partial y^2}\right)",
    r"\int_{-\infty}^{\infty}e^{-\frac{x^2}{2\sigma^2}}dx=\sigma\sqrt{2\pi}",
    r"\sum_{n=1}^{\infty}\frac{1}{n^2}=\frac{\pi^2}{6}",
    r"f(x)=\sum_{k=0}^{n}\frac{f^{(k)}(a)}{k!}(x-a)^k+R_{n}(x)",
    r"\lim_{n\to\infty}\left(1+\frac{x}{n}\right)^n=e^{x}",
    r"P(A|B)=\frac{P(B|A)P(A)}{P(B|A)P(A)+P(B|C)P(C)}",
    r"\int_{0}^{1}x^{a-1}(1-x)^{b-1}dx=\frac{\Gamma(a)\Gamma(b)}{\Gamma(a+b)}",
    r"\zeta(s)=\frac{1}{\Gamma(s)}\int_{0}^{\infty}\frac{x^{s-1}}{e^{x}-1}dx",
    r"i\hbar\frac{\partial}{\partial t}\psi(x,t)=-\frac{\hbar^2}{2m}\frac{\partial^2}{\partial x^2}\psi(x,t)+V(x)\psi(x,t)",
    r"R_{\mu\nu}-\frac{1}{2}R g_{\mu\nu}+\Lambda g_{\mu\nu}=\frac{8\pi G}{c^4}T_{\mu\nu}",
    r"\cos(\alpha+\beta)=\cos\alpha\cos\beta-\sin\alpha\sin\beta",
    r"a_{n}=\frac{2}{T}\int_{0}^{T}f(t)\cos\left(\frac{2\pi nt}{T}\right)dt",
    r"F(\omega)=\int_{-\infty}^{\infty}f(t)e^{-i\omega t}dt",
    r"\frac{d}{dt}\left(\frac{\partial L}{\partial \dot{q}}\right)-\frac{\partial L}{\partial q}=0",
    r"\left(\sum_{i=1}^{n}a_{i}b_{i}\right)^2\leq\left(\sum_{i=1}^{n}a_{i}^2\right)\left(\sum_{i=1}^{n}b_{i}^2\right)",
    r"(x+y)^n=\sum_{k=0}^{n}\binom{n}{k}x^{n-k}y^{k}",
    r"\frac{1}{\sqrt{2\pi\sigma^2}}e^{-\frac{(x-\mu)^2}{2\sigma^2}}",
    r"\nabla\times B=\mu_{0}J+\mu_{0}\epsilon_{0}\frac{\partial E}{\partial t}",
    r"\theta_{t+1}=\theta_{t}-\eta\frac{m_{t}}{\sqrt{v_{t}}+\epsilon}",
    r"A_{ij}=\frac{\exp(q_{i}k_{j}/\sqrt{d})}{\sum_{l=1}^{n}\exp(q_{i}k_{l}/\sqrt{d})}",
    r"y_{i}=\gamma\frac{x_{i}-\mu}{\sqrt{\sigma^2+\epsilon}}+\beta",
    r"\frac{dy}{dx}=\lim_{h\to 0}\frac{f(x+h)-f(x)}{h}",
    r"B(\nu,T)=\frac{2h\nu^3}{c^2}\frac{1}{e^{\frac{h\nu}{kT}}-1}",
    r"\langle x^2\rangle=\frac{\int_{-\infty}^{\infty}x^2e^{-ax^2}dx}{\int_{-\infty}^{\infty}e^{-ax^2}dx}=\frac{1}{2a}",
    r"\prod_{p}\frac{1}{1-p^{-s}}=\sum_{n=1}^{\infty}\frac{1}{n^{s}}",
    r"\phi(x)=\frac{1}{4\pi\epsilon_{0}}\int\frac{\rho(y)}{|x-y|}d^3y",
    r"\frac{\partial\rho}{\partial t}+\nabla\cdot(\rho v)=0",
    r"J_{n}(x)=\frac{1}{\pi}\int_{0}^{\pi}\cos(n\tau-x\sin\tau)d\tau",
    r"\sqrt{1+x}=1+\frac{1}{2}x-\frac{1}{8}x^2+\frac{1}{16}x^3",
    r"G(x,y)=\frac{1}{2\pi\sigma^2}e^{-\frac{x^2+y^2}{2\sigma^2}}",
    r"u(x,t)=\frac{1}{\sqrt{4\pi kt}}\int_{-\infty}^{\infty}e^{-\frac{(x-y)^2}{4kt}}g(y)dy",
    r"\left(\frac{\partial U}{\partial V}\right)_{T}=T\left(\frac{\partial p}{\partial T}\right)_{V}-p",
    r"\frac{1}{r^2}\frac{\partial}{\partial r}\left(r^2\frac{\partial f}{\partial r}\right)+\frac{1}{r^2}\frac{\partial^2 f}{\partial\phi^2}=0",
    r"\lambda_{n}=\frac{n^2\pi^2}{L^2},\quad n=1,2,3",
    r"T_{ab}=(\rho+p)u_{a}u_{b}+p g_{ab}-2\eta\sigma_{ab}",
    r"\Gamma_{bc}^{a}=\frac{1}{2}g^{ad}\left(\partial_{b}g_{dc}+\partial_{c}g_{db}-\partial_{d}g_{bc}\right)",
    r"\frac{1}{p}+\frac{1}{q}=1,\quad\sum_{k=1}^{n}|a_{k}b_{k}|\leq 1",
    r"\psi(x)=\sqrt{\frac{2}{L}}\sin\left(\frac{n\pi x}{L}\right)",
    r"\frac{d^2x}{dt^2}+2\beta\frac{dx}{dt}+\omega_{0}^2x=F\cos\omega t",
    r"x=\frac{-b+\sqrt{b^2-4ac}}{2a},\quad E=\sqrt{p^2c^2+m^2c^4}",
    r"\gamma=\frac{1}{\sqrt{1-\frac{v^2}{c^2}}},\quad H=-\sum_{i=1}^{n}p_{i}\log p_{i}",
    r"\oint_{C}f(z)dz=2\pi i\sum_{k=1}^{n}a_{k},\quad S=\int_{t_{1}}^{t_{2}}L(q,\dot{q},t)dt",
    r"|x+y|\leq |x|+|y|,\quad \binom{n}{k}=\frac{n!}{k!(n-k)!}",
    r"\nabla\cdot E=\frac{\rho}{\epsilon_{0}},\quad \sigma(x)=\frac{1}{1+e^{-x}}",
    r"D_{KL}=\sum_{x}p(x)\log\frac{p(x)}{q(x)},\quad \int_{a}^{b}f(x)dx=F(b)-F(a)",
    r"\int u dv=uv-\int v du,\quad V=\frac{4}{3}\pi r^3",
    r"\sin^2\theta+\cos^2\theta=1,\quad F=G\frac{m_{1}m_{2}}{r^2}",
    r"\alpha=\frac{e^2}{4\pi\epsilon_{0}\hbar c},\quad Z=\sum_{n=0}^{\infty}e^{-\beta E_{n}}",
)


def picture(formula: str, size: tuple[int, int]) -> Tensor:
    """Render a formula to (1, height, width) floats: black on a white page, which is scaled to fit.

    The black border beside the page is what the model was trained with.
    """
    from matplotlib import mathtext, rc_context
    from matplotlib.font_manager import FontProperties

    page = io.BytesIO()
    with rc_context({"mathtext.fontset": "cm"}):
        mathtext.math_to_image(f"${formula}$", page, FontProperties(size=12), dpi=200, format="png")
    line = Image.open(page).convert("L")
    paper = Image.new("L", (max(line.width, WIDTH), line.height), 255)
    paper.paste(line, ((paper.width - line.width) // 2, 0))
    return fit(paper, size)


def fit(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Scale an image to fit and centre it on black."""
    height, width = size
    scale = min(width / image.width, height / image.height)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
        Image.Resampling.BILINEAR,
    )
    canvas = Image.new("L", (width, height), 0)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)[None]
