"""
A welcome mail over SMTP that is retried, and an alert if it cannot be sent. Run it without a mail server first:

    uvicorn signup_mail:app --app-dir examples
    curl -X POST 'http://127.0.0.1:8000/signup?email=ada@example.org'

You will see two `task.retrying` lines and one `task.failed`. Now start a mail server that prints what it gets, sign up
again, and the mail appears there:

    python -m aiosmtpd -n -l 127.0.0.1:1025

To be alerted, name a webhook before you start the app: AFTERTASK_ALERTS='https://example.org/hook'. The first failure
is posted to it at once, with stack, route and owner.
"""

import os
import smtplib
from email.message import EmailMessage

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, Retry, task

HOST = os.environ.get("SMTP_HOST", "127.0.0.1")
PORT = int(os.environ.get("SMTP_PORT", "1025"))

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


@task(
    name="mail.welcome",
    owner="growth",
    timeout=20,
    retry=Retry(attempts=3, wait_initial=0.2, on=(OSError, smtplib.SMTPException)),
    on_failure="contain",
)
def send_welcome_mail(address: str) -> None:
    """A sync task, so it runs in a thread. Sent twice if the server's answer is lost: harmless for a welcome."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "hello@example.org", address, "Welcome"
    message.set_content("It is good to have you here.")
    with smtplib.SMTP(HOST, PORT, timeout=5) as server:
        server.send_message(message)


@app.post("/signup", status_code=202)
async def signup(email: str, tasks: BackgroundTasks) -> dict[str, str]:
    """Respond at once."""
    tasks.add_task(send_welcome_mail, email)
    return {"status": "ok"}
