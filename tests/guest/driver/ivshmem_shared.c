// SPDX-License-Identifier: (GPL-2.0 OR MIT)
/* The shared memory of each ivshmem device as a character device, /dev/ivshmem0 and on.
 *
 * The tests load it into a guest in place of the many drivers that users write or download for this
 * device.  It requests the BAR, as they do.  So a kernel with CONFIG_IO_STRICT_DEVMEM refuses
 * resource2 and /dev/mem from then on.  mmap(2) of the node maps the BAR cached.
 *
 * A device is in `shared_devices` from probe to remove; nothing else is kept, and the PCI core
 * calls these two one after the other.
 *
 * Parameter `orphan`: the nodes get no parent, so that sysfs does not say whose they are.
 */
#include <linux/cdev.h>
#include <linux/device.h>
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>

#define NAME "ivshmem"
#define SHARED_BAR 2
#define MOST 16 /* devices */

static bool orphan;
module_param(orphan, bool, 0444);
MODULE_PARM_DESC(orphan, "make nodes without a parent device");

struct shared {
	struct cdev cdev;
	phys_addr_t start;
	resource_size_t size;
	void *memory; /* mapped here too: the mappings of programs get the same memory type */
	int minor;
};

static struct class *shared_class;
static dev_t first_number;
static struct shared *shared_devices[MOST];

static int shared_open(struct inode *inode, struct file *file)
{
	file->private_data = container_of(inode->i_cdev, struct shared, cdev);
	return 0;
}

static loff_t shared_llseek(struct file *file, loff_t offset, int whence)
{
	struct shared *shared = file->private_data;

	return fixed_size_llseek(file, offset, whence, shared->size);
}

static ssize_t shared_read(struct file *file, char __user *into, size_t count, loff_t *at)
{
	struct shared *shared = file->private_data;

	return simple_read_from_buffer(into, count, at, shared->memory, shared->size);
}

static ssize_t shared_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	struct shared *shared = file->private_data;

	return simple_write_to_buffer(shared->memory, shared->size, at, from, count);
}

static int shared_mmap(struct file *file, struct vm_area_struct *area)
{
	struct shared *shared = file->private_data;
	u64 offset = (u64)area->vm_pgoff << PAGE_SHIFT;
	u64 length = area->vm_end - area->vm_start;

	if (offset > shared->size || length > shared->size - offset)
		return -EINVAL;
	return remap_pfn_range(area, area->vm_start, (shared->start + offset) >> PAGE_SHIFT,
			       length, area->vm_page_prot);
}

static const struct file_operations shared_operations = {
	.owner = THIS_MODULE,
	.open = shared_open,
	.llseek = shared_llseek,
	.read = shared_read,
	.write = shared_write,
	.mmap = shared_mmap,
};

static int free_minor(void)
{
	int minor;

	for (minor = 0; minor < MOST; minor++)
		if (!shared_devices[minor])
			return minor;
	return -ENOSPC;
}

static int make_node(struct shared *shared, struct device *parent)
{
	dev_t number = first_number + shared->minor;
	struct device *made;
	int error;

	cdev_init(&shared->cdev, &shared_operations);
	shared->cdev.owner = THIS_MODULE;
	error = cdev_add(&shared->cdev, number, 1);
	if (error)
		return error;
	made = device_create(shared_class, orphan ? NULL : parent, number, NULL, NAME "%d",
			     shared->minor);
	if (IS_ERR(made)) {
		cdev_del(&shared->cdev);
		return PTR_ERR(made);
	}
	return 0;
}

static int map_bar(struct pci_dev *device, struct shared *shared)
{
	shared->start = pci_resource_start(device, SHARED_BAR);
	shared->size = pci_resource_len(device, SHARED_BAR);
	if (!shared->start || !shared->size)
		return -ENODEV; /* the BAR got no address */
	shared->memory = ioremap_cache(shared->start, shared->size);
	return shared->memory ? 0 : -ENOMEM;
}

static int shared_probe(struct pci_dev *device, const struct pci_device_id *id)
{
	struct shared *shared;
	int error;

	shared = kzalloc(sizeof(*shared), GFP_KERNEL);
	if (!shared)
		return -ENOMEM;
	error = shared->minor = free_minor();
	if (error < 0)
		goto free;
	error = pci_enable_device(device);
	if (error)
		goto free;
	error = pci_request_region(device, SHARED_BAR, NAME);
	if (error)
		goto disable;
	error = map_bar(device, shared);
	if (error)
		goto release;
	error = make_node(shared, &device->dev);
	if (error)
		goto unmap;
	pci_set_drvdata(device, shared);
	shared_devices[shared->minor] = shared;
	return 0;

unmap:
	iounmap(shared->memory);
release:
	pci_release_region(device, SHARED_BAR);
disable:
	pci_disable_device(device);
free:
	kfree(shared);
	return error;
}

static void shared_remove(struct pci_dev *device)
{
	struct shared *shared = pci_get_drvdata(device);

	device_destroy(shared_class, first_number + shared->minor);
	cdev_del(&shared->cdev);
	iounmap(shared->memory);
	pci_release_region(device, SHARED_BAR);
	pci_disable_device(device);
	shared_devices[shared->minor] = NULL;
	kfree(shared);
}

static const struct pci_device_id shared_ids[] = {
	{ PCI_DEVICE(0x1af4, 0x1110) },
	{ }
};
MODULE_DEVICE_TABLE(pci, shared_ids);

static struct pci_driver shared_driver = {
	.name = "ivshmem_shared",
	.id_table = shared_ids,
	.probe = shared_probe,
	.remove = shared_remove,
};

static int __init shared_init(void)
{
	int error = alloc_chrdev_region(&first_number, 0, MOST, NAME);

	if (error)
		return error;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	shared_class = class_create(NAME);
#else
	shared_class = class_create(THIS_MODULE, NAME);
#endif
	if (IS_ERR(shared_class)) {
		error = PTR_ERR(shared_class);
		goto unregister;
	}
	error = pci_register_driver(&shared_driver);
	if (!error)
		return 0;
	class_destroy(shared_class);
unregister:
	unregister_chrdev_region(first_number, MOST);
	return error;
}

static void __exit shared_exit(void)
{
	pci_unregister_driver(&shared_driver);
	class_destroy(shared_class);
	unregister_chrdev_region(first_number, MOST);
}

module_init(shared_init);
module_exit(shared_exit);
MODULE_DESCRIPTION("The shared memory of ivshmem devices as character devices");
MODULE_LICENSE("Dual MIT/GPL");
