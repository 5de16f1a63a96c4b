// SPDX-License-Identifier: GPL-2.0
/*
 * The control queue: one command at a time, and its answer.
 */
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include "dmbridge.h"

#define ANSWER_ROOM	(sizeof(struct dmbridge_answer) + 64)

int dmbridge_control_init(struct dmbridge *dev, struct virtqueue *vq)
{
	struct dmbridge_control *control = &dev->control;

	control->vq = vq;
	/* The longest commands: REGISTER with one segment, and RENDEZVOUS. */
	control->request_room = sizeof(struct dmbridge_command) +
				max(sizeof(struct dmbridge_register) +
					    sizeof(struct dmbridge_segment),
				    sizeof(struct dmbridge_rendezvous));
	control->request = kzalloc(control->request_room, GFP_KERNEL);
	control->answer = kzalloc(ANSWER_ROOM, GFP_KERNEL);
	return control->request && control->answer ? 0 : -ENOMEM;
}

void dmbridge_control_free(struct dmbridge *dev)
{
	kfree(dev->control.request);
	kfree(dev->control.answer);
}

void dmbridge_control_interrupt(struct virtqueue *vq)
{
	struct dmbridge *dev = vq->vdev->priv;
	struct dmbridge_control *control = &dev->control;
	unsigned long flags;
	unsigned int len;
	bool broken;
	void *used;

	spin_lock_irqsave(&control->lock, flags);
	used = virtqueue_get_buf(vq, &len);
	broken = virtqueue_is_broken(vq);
	if (used)
		control->answer_len = len;
	else if (broken)
		control->answer_len = 0;
	spin_unlock_irqrestore(&control->lock, flags);
	if (broken)
		dmbridge_break(dev, "its control queue breaks its contract");
	if (used || broken)
		complete(&control->answered);
}

/* A status of the device as an error of ours. */
static int dmbridge_errno(u8 status)
{
	switch (status) {
	case 0:
		return 0;
	case ENOENT:
	case EIO:
	case E2BIG:
	case EAGAIN:
	case ENOMEM:
	case EFAULT:
	case EINVAL:
	case ENOSPC:
		return -(int)status;
	/* These have other numbers on some architectures, but not in an answer. */
	case 95:
		return -EOPNOTSUPP;
	case 104:
		return -ECONNRESET;
	case 114:
		return -EALREADY;
	case 122:
		return -EDQUOT;
	default:
		return -EPROTO;
	}
}

/**
 * dmbridge_command() - have the device do something
 * @dev: the device
 * @what: DMBRIDGE_QUERY_GID and the like
 * @body: of the command
 * @body_len: its length
 * @reply: filled, if the command succeeds
 * @reply_len: what the reply has to have
 *
 * Context: may sleep, as long as the device takes.
 * Return: 0, or the device's error; -EIO if it is broken.
 */
int dmbridge_command(struct dmbridge *dev, u16 what, const void *body, size_t body_len,
		     void *reply, size_t reply_len)
{
	struct dmbridge_control *control = &dev->control;
	struct scatterlist request, answer, *sgs[] = { &request, &answer };
	int rc = -EIO;

	might_sleep();
	if (WARN_ON(sizeof(*control->request) + body_len > control->request_room ||
		    sizeof(*control->answer) + reply_len > ANSWER_ROOM))
		return -EINVAL;
	mutex_lock(&control->mutex);
	/* After a command that was not answered the buffers are the device's. */
	if (dmbridge_is_broken(dev))
		goto out;
	memset(control->request, 0, sizeof(*control->request));
	control->request->class = what >> 8;
	control->request->command = what & 0xff;
	memcpy(control->request->body, body, body_len);
	control->answer->status = 0xff;
	reinit_completion(&control->answered);
	sg_init_one(&request, control->request, sizeof(*control->request) + body_len);
	sg_init_one(&answer, control->answer, sizeof(*control->answer) + reply_len);

	spin_lock_irq(&control->lock);
	rc = virtqueue_add_sgs(control->vq, sgs, 1, 1, control, GFP_ATOMIC);
	if (!rc)
		virtqueue_kick(control->vq);
	spin_unlock_irq(&control->lock);
	if (rc) {
		dmbridge_break(dev, "its control queue does not take a command");
		rc = -EIO;
		goto out;
	}
	dmbridge_count(dev, commands, 1);
	if (!wait_for_completion_timeout(&control->answered,
					 msecs_to_jiffies(DMBRIDGE_PATIENCE_MS))) {
		dmbridge_break(dev, "it does not answer a command");
		rc = -EIO;
		goto out;
	}
	if (control->answer_len < sizeof(*control->answer)) {
		rc = -EPROTO;
	} else {
		rc = dmbridge_errno(control->answer->status);
		if (!rc && control->answer_len != sizeof(*control->answer) + reply_len)
			rc = -EPROTO;
	}
	if (rc == -EPROTO) {
		dmbridge_break(dev, "its answer to a command is none");
		rc = -EIO;
	}
	if (!rc && reply_len)
		memcpy(reply, control->answer->reply, reply_len);
out:
	mutex_unlock(&control->mutex);
	return rc;
}
