"""ACME (RFC 8555): clients such as certbot get, renew and revoke server certificates by themselves.

    server.py ──► requests.py (JWS, nonce, account) ──► accounts.py, orders.py, certificates.py ──► issuing, revoking
                                                              └──► probes.py: http-01 and dns-01, asked from here

A user who may issue from an authority makes an account (AcmeService), and hands its id and its secret to a client. With them the
client binds its own key to the account (external account binding). From then on it orders certificates as that user.
"""
